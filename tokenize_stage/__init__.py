"""Stage one: images go through a frozen visual tokenizer once, and come out as committed shards of codes."""
