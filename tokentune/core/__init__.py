"""The method: layers run on two groups of tokens, of which one keeps gradients. Nothing about files, flags or runs.

Read `selective_layer.py` first. In a forward pass `patching.py` reads the call, `model_sampling.py` chooses the tokens,
`step_plan.py` decides, `selective_layer.py` and `attention/` run the layers, and `loss.py` takes the loss.
"""
