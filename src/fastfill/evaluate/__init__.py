"""Measure an artifact, always dense beside sparse on the same code path and the same examples.

Quality: `perplexity`, `longbench`, `ruler`, `recall` (by name in `tasks`); speed: `speed`, with
`flops` and, beside other engines, `compare`. `runner` answers examples twice and
says what is recovered; `resume` keeps finished items; `lm_eval` is a model class for EleutherAI's harness.
"""
