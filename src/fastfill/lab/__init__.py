"""Measure an artifact, always dense beside sparse on the same code path and the same examples. The product never imports it.

Quality: `tasks` has a class per task, for the command and for Python; each measures by the module of its name (`perplexity`,
`longbench`, `ruler`, `recall`, `picks`, `pareto`; `published` for peers, with the `baselines`). `runner` runs each `example`
twice and says what is recovered, by the score of the generated answer and by the `likelihood` of the right one; `chance`,
`intervals` and `pace` help it, `resume` keeps finished items. `lm_eval` is a model class for EleutherAI's harness.
Speed: `speed`, with `flops` and, beside other engines, `compare`. `report` draws stored results.
"""
