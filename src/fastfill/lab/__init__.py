"""Measure an artifact, always dense beside sparse on the same code path and the same examples.

Quality: `perplexity`, `longbench`, `ruler`, `recall` (by name in `tasks`); speed: `speed`, with
`flops` and, beside other engines, `compare`. `runner` reads each `example` twice and says what is recovered, by the score of
the answer that is written and by the `likelihood` of the right one; `chance`, `intervals` and `pace` help it, `resume` keeps
finished items; `lm_eval` is a model class for EleutherAI's harness.
"""
