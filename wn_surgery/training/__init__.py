"""What training needs of a weight-normed model.

In: a model, its optimizers, a first batch.
Out: parameter groups, initial values, statistics, optimizer states under new names.
Imports: errors, tables, norm, rules, model, surgery.
"""
