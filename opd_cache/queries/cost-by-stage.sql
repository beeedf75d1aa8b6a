-- Where the time and the disk went: seconds, tokens and bytes of rollout, score, learn and the evaluations' shards.
WITH pieces AS (
    SELECT CASE WHEN episode IS NULL THEN 'eval ' ELSE '' END || stage AS stage, seconds, tokens, bytes FROM shards
    UNION ALL BY NAME
    SELECT 'learn' AS stage, read_s + compute_s AS seconds, tokens FROM steps
)
SELECT stage, sum(seconds) AS seconds, sum(seconds) / sum(sum(seconds)) OVER () AS share,
    sum(tokens)::BIGINT AS tokens, sum(bytes)::BIGINT AS bytes
FROM pieces
GROUP BY stage
ORDER BY seconds DESC
