-- Mean reverse KL and reward by the prompts' field domain, subject, category, type or level (the first that a prompt has).
SELECT teacher, coalesce(
        fields->>'domain', fields->>'subject', fields->>'category', fields->>'type', fields->>'level', '(none)'
    ) AS domain,
    sum(reverse_kl_sum) / sum(num_scored_tokens) AS reverse_kl, avg(reward) AS reward, count(*) AS responses
FROM samples JOIN prompts USING (prompt_index)
GROUP BY ALL
ORDER BY reverse_kl DESC, domain
