"""Engines: everything that turns a `StepPlan` into logits, behind one protocol."""
