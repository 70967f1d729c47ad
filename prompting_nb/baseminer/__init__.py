"The miner: what it refuses, whom it serves first, how it answers and how it stays alive."
