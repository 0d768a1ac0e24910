"""What a stage will take: plain arithmetic on what headers and config.json say."""
