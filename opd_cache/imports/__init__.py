"""Outside rollouts as an episode of a run: read, checked row by row, and published like our own."""
