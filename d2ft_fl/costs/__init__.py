"""What a schedule costs a client: FLOPs, memory, bytes up, bytes down."""
