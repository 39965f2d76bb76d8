"""What several tests share: small models, tasks and files, slow references, and programs that tests start."""
