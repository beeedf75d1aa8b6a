-- Responses without a token before their EOS, by episode: their share, how many prompts they are of, and the first of them.
WITH marked AS (
    SELECT *, num_response_tokens - (finish_reason = 'stop')::INTEGER <= 0 AS is_empty FROM rollouts
)
SELECT episode, avg(is_empty::INTEGER) AS empty_share, count(*) FILTER (is_empty) AS empty_responses,
    count(DISTINCT prompt_index) FILTER (is_empty) AS prompts, min(rollout_id) FILTER (is_empty) AS first, count(*) AS responses
FROM marked
GROUP BY ALL
ORDER BY episode
