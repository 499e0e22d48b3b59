"""Attention back ends behind one interface.

A back end is called once per layer with the fused projection of the step's tokens, q|k|v
[T, (heads + 2 * kv_heads) * head_dim]; it stores keys and values in the layer's cache and returns
[T, heads * head_dim]. Positions, masks and lengths come from `StepInputs`.
"""
