-- How far two teachers are apart on the same tokens, by episode: mean difference of their log-probs, its size, correlation.
WITH pairs AS (
    SELECT a.episode, a.teacher, b.teacher AS other,
        unnest(a.teacher_logprobs) AS logprob, unnest(b.teacher_logprobs) AS other_logprob
    FROM scores a JOIN scores b USING (episode, rollout_id, first_token)
    WHERE a.teacher < b.teacher
)
SELECT episode, teacher, other, avg(logprob - other_logprob) AS difference,
    avg(abs(logprob - other_logprob)) AS absolute_difference, corr(logprob, other_logprob) AS correlation, count(*) AS tokens
FROM pairs
WHERE logprob IS NOT NULL AND other_logprob IS NOT NULL
GROUP BY ALL
ORDER BY episode, teacher, other
