"""Measurements that are too long for the test suite, and what they gave (docs/results.md, docs/performance.md)."""
