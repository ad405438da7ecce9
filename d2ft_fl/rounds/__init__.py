"""One round as a pure function: state and reports in, plan and messages out."""
