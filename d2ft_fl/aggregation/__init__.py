"""How clients' partial updates become the next global model, slice by slice."""
