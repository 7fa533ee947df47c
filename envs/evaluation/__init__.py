"""Any policy in any environment: success rate with its interval, and controls. May import experts and backends."""
