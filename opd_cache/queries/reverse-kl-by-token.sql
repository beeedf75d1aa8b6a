-- The 30 tokens of the vocabulary that add most to the reverse KL, with their share of it.
WITH by_token AS (
    SELECT teacher, token_id, count(advantage) AS tokens, -avg(advantage) AS reverse_kl, -sum(advantage) AS reverse_kl_sum
    FROM tokens
    GROUP BY ALL
)
SELECT teacher, token_id, text, tokens, reverse_kl, reverse_kl_sum / sum(reverse_kl_sum) OVER (PARTITION BY teacher) AS share
FROM by_token LEFT JOIN vocab USING (token_id)
ORDER BY reverse_kl_sum DESC, token_id
LIMIT 30
