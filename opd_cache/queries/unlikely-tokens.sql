-- Tokens that a teacher gives a probability below 1e-6, by episode: their share, the commonest of them, and where the first one is.
WITH scored AS (
    SELECT episode, teacher, rollout_id, position, text, teacher_logprob < ln(1e-6) AS is_unlikely
    FROM tokens
    WHERE teacher_logprob IS NOT NULL
)
SELECT episode, teacher, avg(is_unlikely::INTEGER) AS unlikely_share, count(*) FILTER (is_unlikely) AS unlikely_tokens,
    mode(text) FILTER (is_unlikely) AS commonest, min((rollout_id, position)) FILTER (is_unlikely) AS first, count(*) AS tokens
FROM scored
GROUP BY ALL
ORDER BY episode, teacher
