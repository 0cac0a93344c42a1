"""What operators see: logs, the doctor."""
