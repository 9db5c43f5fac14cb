"""Which parameters to change, and how: the rule language.

In: Python objects, YAML, JSON, or the name of a preset.
Out: a tuple of :class:`Rule`.
Imports: errors, norm.
"""

from wn_surgery.rules.rule import Rule
from wn_surgery.rules.sources import RulesLike, as_rules, dump_rules, load_rules

__all__ = ["Rule", "RulesLike", "as_rules", "dump_rules", "load_rules"]
