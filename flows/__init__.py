"""Schedules, retries, logs and state around DVC's graph, by Prefect.

In: ``dvc.yaml``. Out: a flow that runs its stages, one task each.
"""
