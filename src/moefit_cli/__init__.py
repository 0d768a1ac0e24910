"""The command line. A package of its own: importing moefit loads torch and transformers, and help should not wait."""
