"""A real OpenID provider on loopback: Canaille, with two people and a client, in memory.

  python tests/fakes/openid.py PORT REDIRECT_URI

It prints its address when it listens.
"""

import os
import sys

CLIENT, SECRET = "console", "a-secret-of-the-client"
PASSWORD = "correct horse battery staple"


def serve(port: int, redirect_uri: str) -> None:
    os.environ["AUTHLIB_INSECURE_TRANSPORT"] = "1"
    from canaille import create_app
    from canaille.app import models
    from canaille.backends import Backend
    from canaille.oidc.provider import AuthorizationCodeGrant
    from joserfc.jwk import RSAKey
    from werkzeug.serving import make_server

    address = f"http://localhost:{port}"
    app = create_app(
        {
            "SECRET_KEY": "for this test",
            "SERVER_NAME": f"localhost:{port}",
            "PREFERRED_URL_SCHEME": "http",
            "TRUSTED_DOMAINS": ["client.example"],
            "CANAILLE": {"DATABASE": "memory", "CAPTCHA_ENABLED": False},
            "CANAILLE_OIDC": {
                "ACTIVE_JWKS": [RSAKey.generate_key(2048, {"kid": "1"}).as_dict(private=True)]
            },
        }
    )
    with app.app_context(), Backend.instance.session():
        for name in ("ada", "mallory"):
            person = models.User(
                user_name=name,
                formatted_name=name,
                family_name=name,
                emails=[f"{name}@example.com"],
                password=PASSWORD,
            )
            Backend.instance.save(person)
        client = models.Client(
            client_id=CLIENT,
            client_secret=SECRET,
            client_name="chatflow",
            client_uri="https://client.example",
            redirect_uris=[redirect_uri],
            grant_types=["authorization_code"],
            response_types=["code"],
            scope=["openid", "email", "profile"],
            token_endpoint_auth_method="client_secret_basic",
        )
        Backend.instance.save(client)
        client.audience = [client]
        Backend.instance.save(client)

    def find_code(_: AuthorizationCodeGrant, code: str, client: models.Client) -> object:
        # Canaille's memory joins conditions by "or", so that each code of a client would do.
        found = Backend.instance.query(models.AuthorizationCode, code=code)
        return next((each for each in found if each.client == client), None)

    AuthorizationCodeGrant.query_authorization_code = find_code
    server = make_server("localhost", port, app, threaded=True)
    print(address, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])
