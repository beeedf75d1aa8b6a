-- How far the learner's log-probs are from the sampler's, by episode: importance ratios, effective sample size, staleness.
SELECT episode, avg(ratio_mean) AS ratio_mean, max(ratio_max) AS ratio_max, avg(ess) AS ess, min(ess) AS lowest_ess,
    arg_min(ratio_mean, step) AS first_step_ratio, avg(staleness) AS staleness, avg(clipped_share) AS clipped_share
FROM steps
GROUP BY ALL
ORDER BY episode
