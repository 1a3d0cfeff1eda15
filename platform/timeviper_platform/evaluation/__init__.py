"""From weights and questions to scores and figures."""
