"""Weight norm as a callback of a training framework; each module needs its framework installed.

The folder is ``callbacks/`` at the top of the repository, installed as ``wn_surgery.callbacks``.

In: the Trainer of Lightning or of transformers.
Out: the same training, with weight norm.
Imports: norm, rules, model, surgery, training, fused, export, reporting, huggingface.
"""
