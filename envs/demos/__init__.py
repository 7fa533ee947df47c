"""Recording demonstrations as LeRobot datasets. May import experts and backends."""
