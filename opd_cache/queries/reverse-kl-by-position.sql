-- Mean reverse KL (nats a token) at each place of the response, and how many responses reach it.
SELECT teacher, position, -avg(advantage) AS reverse_kl, count(advantage) AS tokens
FROM tokens
GROUP BY ALL
ORDER BY teacher, position
