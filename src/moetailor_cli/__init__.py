"""The command line. A package of its own: importing moetailor loads torch, and help should not wait."""
