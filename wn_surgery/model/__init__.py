"""What is in a live model: its sites, their layouts, and their weights for a while.

In: a module tree.
Out: sites, records and state-dict keys; the contexts ``folded`` and ``writable``.
Imports: errors, norm, rules.
"""
