"""`bitfold bench`: bitfold beside its peers, each case validated and then timed (docs/benchmarks.md).

Not imported by `import bitfold`.
"""
