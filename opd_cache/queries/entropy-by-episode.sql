-- Mean entropy of the student's next token (nats) while it learns, by episode, and its ratio to that of the first two.
WITH learned AS (
    SELECT * FROM steps WHERE tokens > 0
)
SELECT episode, avg(entropy) AS entropy,
    avg(entropy) / (SELECT avg(entropy) FROM learned WHERE episode < 2) AS entropy_ratio,
    arg_min(entropy, step) AS first_step, arg_max(entropy, step) AS last_step, count(*) AS steps
FROM learned
GROUP BY ALL
ORDER BY episode
