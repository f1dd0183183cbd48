"""What a deployment needs beside the code: certificates, signing keys."""
