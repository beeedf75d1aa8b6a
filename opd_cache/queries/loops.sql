-- Responses that were cut in a loop (their last 16 tokens stand in them three times or more): share by episode, and the worst.
WITH cut AS (
    SELECT episode, rollout_id, response_ids AS ids FROM rollouts WHERE finish_reason = 'length'
), places AS (
    SELECT episode, rollout_id, unnest(ids) AS token_id, generate_subscripts(ids, 1) AS place, ids[-1] AS last_id FROM cut
), looping AS (
    SELECT episode, rollout_id, count(*) AS times
    FROM (SELECT * FROM places WHERE token_id = last_id AND place >= 16) JOIN cut USING (episode, rollout_id)
    WHERE ids[place - 15 : place] = ids[-16:]
    GROUP BY ALL
    HAVING times >= 3
)
SELECT episode, count(times) / count(*) AS loop_share, count(times) AS looping,
    count(*) FILTER (finish_reason = 'length') AS cut, arg_max(rollout_id, times) AS worst, max(times) AS times_in_it,
    count(*) AS responses
FROM rollouts LEFT JOIN looping USING (episode, rollout_id)
GROUP BY ALL
ORDER BY episode
