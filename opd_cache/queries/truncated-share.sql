-- Share of responses that were cut before their EOS, by episode, and how long responses are.
SELECT episode, avg((finish_reason = 'length')::INTEGER) AS truncated_share, avg(num_response_tokens) AS response_tokens,
    quantile_disc(num_response_tokens, 0.5) AS median_tokens, max(num_response_tokens) AS longest, count(*) AS responses
FROM rollouts
GROUP BY ALL
ORDER BY episode
