"""The core: one synchronous loop over tokens, memory and order.

ingest -> schedule -> run -> account -> emit
"""
