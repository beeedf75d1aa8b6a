-- Mean reverse KL (nats a token) of every episode's responses, per teacher, with their mean length and reward.
SELECT episode, teacher, sum(reverse_kl_sum) / sum(num_scored_tokens) AS reverse_kl,
    avg(num_response_tokens) AS response_tokens, avg(reward) AS reward, count(error) AS unscored, count(*) AS responses
FROM samples
GROUP BY ALL
ORDER BY episode, teacher
