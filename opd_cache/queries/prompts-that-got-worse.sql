-- Prompts whose mean reverse KL rose most from the first to the last episode that sampled them.
WITH by_prompt AS (
    SELECT teacher, prompt_index, episode, sum(reverse_kl_sum) / sum(num_scored_tokens) AS reverse_kl, avg(reward) AS reward
    FROM samples
    GROUP BY ALL
), first_and_last AS (
    SELECT teacher, prompt_index, min(episode) AS first_episode, max(episode) AS last_episode,
        arg_min(reverse_kl, episode) AS first_reverse_kl, arg_max(reverse_kl, episode) AS last_reverse_kl,
        arg_min(reward, episode) AS first_reward, arg_max(reward, episode) AS last_reward
    FROM by_prompt
    GROUP BY ALL
)
SELECT f.*, last_reverse_kl - first_reverse_kl AS rise, left(text, 80) AS prompt
FROM first_and_last f JOIN prompts USING (prompt_index)
WHERE last_reverse_kl > first_reverse_kl
ORDER BY rise DESC, prompt_index
LIMIT 20
