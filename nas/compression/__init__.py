"""Compression methods: each makes a Plan, pure data that turns a model into a smaller one."""
