"""Durable HTTP steps: what may be called (policy, url), how (network, transport, client), what comes back (envelope).

`client.HttpClient.perform` makes one call. `runner.HttpRunner` makes it a step of a workflow.
"""
