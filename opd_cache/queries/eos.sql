-- What a teacher thinks of the EOS where the student ended: its probability, rank and advantage, by episode.
SELECT episode, teacher, count(*) AS ended, avg(exp(student_logprob)) AS student_probability,
    avg(exp(teacher_logprob)) AS teacher_probability, avg(advantage) AS advantage,
    avg((teacher_rank = 1)::INTEGER) AS likeliest_share
FROM tokens
WHERE position = num_response_tokens - 1 AND finish_reason = 'stop' AND teacher_logprob IS NOT NULL
GROUP BY ALL
ORDER BY episode, teacher
