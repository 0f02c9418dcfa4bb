"""Schedules, retries, logs and state around DVC's graph, by Prefect.

In: ``dvc.yaml``. Out: a flow that runs its stages, one task each.
"""

import os

# Read when prefect is imported: no telemetry, and time enough for its own server to start.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "90")
