-- The 20 tokens that a teacher would least have sampled in the student's place.
SELECT episode, rollout_id, teacher, position, text, student_logprob, teacher_logprob, advantage, teacher_rank
FROM tokens
WHERE advantage IS NOT NULL
ORDER BY advantage, rollout_id, position
LIMIT 20
