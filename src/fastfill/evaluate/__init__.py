"""Measure an artifact: quality (`perplexity`) and speed (`speed`), always dense beside sparse on the same code path."""
