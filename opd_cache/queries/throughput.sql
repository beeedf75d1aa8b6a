-- Tokens a second of every stage by host and engine, its slowest shard, and the time that its shards took together.
SELECT stage, host, engine, count(*) AS shards, sum(tokens) / sum(seconds) AS tokens_per_s,
    min(tokens / seconds) AS slowest_tokens_per_s, arg_min(file, tokens / seconds) AS slowest_shard, sum(seconds) AS seconds
FROM shards
WHERE seconds IS NOT NULL AND tokens IS NOT NULL
GROUP BY ALL
ORDER BY stage, host, engine
