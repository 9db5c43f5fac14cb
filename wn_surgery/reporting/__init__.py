"""A page to look at: what is in a model or a checkpoint, and how it trained.

In: a model, rules, a history of its training; or the inspection of a checkpoint.
Out: one HTML file.
Imports: errors, norm, rules, model, surgery, training, checkpoints.
"""
