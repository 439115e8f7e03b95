-- Secret variables: df.setvar(name, value, secret => true). The value is sealed here, in the caller's session, before it is
-- stored; only a worker, which knows dfproxy's secret, can open it (engine/http/secrets.py; docs/decisions/0004-secret-variables.md).
--
-- RSA-OAEP with SHA-256 (RFC 8017, 7.1.1): PostgreSQL has the hash and arithmetic of any size, and sealing needs no secret.

-- `value` is then '***', which is what everybody sees; `sealed` goes into the snapshot that df.start takes.
ALTER TABLE duroxide.vars ADD COLUMN sealed text;

-- A secret that is overwritten by an ordinary value is no secret any more.
CREATE FUNCTION duroxide.on_var_update() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.sealed := NULL;
    RETURN NEW;
END $$;
CREATE TRIGGER on_var_update BEFORE UPDATE OF value, name, owner ON duroxide.vars
    FOR EACH ROW WHEN (OLD.sealed IS NOT NULL AND NEW.sealed IS NOT DISTINCT FROM OLD.sealed)
    EXECUTE FUNCTION duroxide.on_var_update();

-- Keys. `private` is encrypted under a key that derives from dfproxy's secret. Readable by the owner alone.
CREATE TABLE duroxide.secret_keys (
    id         text PRIMARY KEY,
    modulus    text NOT NULL,       -- hexadecimal; the exponent is 65537
    private    bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- The key to seal with. With the owner's rights, since the table is not for everybody; this half of it is.
CREATE VIEW duroxide.public_key AS
SELECT k.id, k.modulus FROM duroxide.secret_keys k ORDER BY k.created_at DESC LIMIT 1;
GRANT SELECT ON duroxide.public_key TO PUBLIC;

-- Bytes as a number and back, eight hexadecimal digits at a time.
CREATE FUNCTION duroxide.hex_to_number(digits text) RETURNS numeric
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_digits text := repeat('0', (8 - length(digits) % 8) % 8) || digits;
    v_number numeric := 0;
BEGIN
    FOR i IN 0 .. length(v_digits) / 8 - 1 LOOP
        v_number := v_number * 4294967296 + ('x' || lpad(substr(v_digits, i * 8 + 1, 8), 16, '0'))::bit(64)::bigint;
    END LOOP;
    RETURN v_number;
END $$;

CREATE FUNCTION duroxide.number_to_hex(number numeric, digits integer) RETURNS text
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_rest numeric := number;
    v_hex text := '';
BEGIN
    WHILE v_rest > 0 LOOP
        v_hex := lpad(to_hex(mod(v_rest, 4294967296)::bigint), 8, '0') || v_hex;
        v_rest := div(v_rest, 4294967296);
    END LOOP;
    RETURN right(lpad(v_hex, greatest(digits, length(v_hex)), '0'), digits);
END $$;

-- Two byte strings of one length, XORed.
CREATE FUNCTION duroxide.xor(a bytea, b bytea) RETURNS bytea
LANGUAGE plpgsql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_bytes bytea := a;
BEGIN
    FOR i IN 0 .. length(a) - 1 LOOP
        v_bytes := set_byte(v_bytes, i, get_byte(a, i) # get_byte(b, i));
    END LOOP;
    RETURN v_bytes;
END $$;

-- MGF1 with SHA-256 (RFC 8017, B.2.1).
CREATE FUNCTION duroxide.mgf1(seed bytea, size integer) RETURNS bytea
LANGUAGE sql IMMUTABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT substr(string_agg(sha256(seed || int4send(i)), ''::bytea ORDER BY i), 1, size)
      FROM generate_series(0, (size + 31) / 32 - 1) i
$$;

-- One block: at most 318 bytes under a key of 3072 bits. In hexadecimal.
CREATE FUNCTION duroxide.rsa_oaep(modulus text, message bytea, label bytea) RETURNS text
LANGUAGE plpgsql VOLATILE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_size CONSTANT integer := length(modulus) / 2;
    v_n CONSTANT numeric := duroxide.hex_to_number(modulus);
    -- 366 random bits from the server's strong source, as 32 bytes.
    v_seed CONSTANT bytea := sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()));
    v_block bytea := sha256(label) || decode(repeat('00', v_size - length(message) - 66) || '01', 'hex') || message;
    v_base numeric;
    v_power numeric;
BEGIN
    v_block := duroxide.xor(v_block, duroxide.mgf1(v_seed, length(v_block)));
    v_base := duroxide.hex_to_number(encode(duroxide.xor(v_seed, duroxide.mgf1(v_block, 32)) || v_block, 'hex'));
    v_power := v_base;
    FOR i IN 1 .. 16 LOOP
        v_power := mod(v_power * v_power, v_n);
    END LOOP;
    RETURN duroxide.number_to_hex(mod(v_power * v_base, v_n), v_size * 2);
END $$;

-- A value, sealed for the variable `name` of the caller: nobody else's, and no other one, opens with it.
CREATE FUNCTION duroxide.seal(name text, value text) RETURNS text
LANGUAGE plpgsql VOLATILE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_key record;
    v_id CONSTANT text := replace(gen_random_uuid()::text, '-', '');
    v_bytes CONSTANT bytea := convert_to(value, 'UTF8');
    v_most CONSTANT integer := 300;
    v_count CONSTANT integer := greatest(1, (length(v_bytes) + v_most - 1) / v_most);
    v_text text;
    v_label text;
    v_part text;
BEGIN
    IF length(v_bytes) > 8192 THEN
        RAISE EXCEPTION 'a secret variable may have at most 8192 bytes' USING ERRCODE = '54000';
    END IF;
    SELECT k.id, k.modulus INTO v_key FROM duroxide.public_key k;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no key yet to seal secret variables with'
            USING ERRCODE = '55000', HINT = 'dfproxy makes one when it starts, or at `dfproxy init`.';
    END IF;
    v_text := 'dfproxy-sealed:1:' || v_key.id || ':' || v_id;
    FOR i IN 1 .. v_count LOOP
        v_label := '';
        FOREACH v_part IN ARRAY ARRAY[v_id, i || '/' || v_count, current_user::text, seal.name] LOOP
            v_label := v_label || octet_length(convert_to(v_part, 'UTF8')) || ':' || v_part || ',';
        END LOOP;
        v_text := v_text || ':' || duroxide.rsa_oaep(v_key.modulus, substr(v_bytes, (i - 1) * v_most + 1, v_most),
                                                     convert_to(v_label, 'UTF8'));
    END LOOP;
    RETURN v_text;
END $$;

CREATE FUNCTION df.setvar(name text, value text, secret boolean) RETURNS text
LANGUAGE plpgsql STRICT
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT secret THEN
        RETURN df.setvar(name, value);
    ELSIF duroxide.in_workflow() THEN
        RAISE EXCEPTION 'df.setvar() cannot be called inside a workflow - set variables before starting the workflow'
            USING ERRCODE = '55000';
    END IF;
    INSERT INTO duroxide.vars (name, value, sealed)
    VALUES (setvar.name, '***', duroxide.seal(setvar.name, setvar.value))
    ON CONFLICT ON CONSTRAINT vars_pkey DO UPDATE SET value = EXCLUDED.value, sealed = EXCLUDED.sealed;
    RETURN 'OK';
END $$;
