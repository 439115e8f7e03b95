-- Who may use `df`: df.grant_usage, df.revoke_usage, and the executor logins (SURFACE 1.8; docs/security.md).
-- Stricter than the original: nobody but the owner writes statuses or nodes, and a lease's token is readable by nobody else.

-- What the calling role must have run for it before it can make `p_role` an executor, or NULL. PostgreSQL 16 and later want
-- ADMIN OPTION on a role from who grants it; before, CREATEROLE was enough for all but superusers.
CREATE FUNCTION duroxide.missing_for_executor(p_role oid) RETURNS text
LANGUAGE plpgsql STABLE STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_super boolean;
    v_createrole boolean;
BEGIN
    SELECT r.rolsuper, r.rolcreaterole INTO v_super, v_createrole FROM pg_roles r WHERE r.rolname = current_user;
    IF v_super THEN
        RETURN NULL;
    ELSIF NOT v_createrole AND to_regrole('dfx_' || p_role) IS NULL THEN
        RETURN format('ALTER ROLE %I CREATEROLE', current_user);
    ELSIF (current_setting('server_version_num')::integer >= 160000 OR NOT v_createrole)
        AND NOT pg_has_role(current_user, p_role, 'MEMBER WITH ADMIN OPTION') THEN
        RETURN format('GRANT %s TO %I WITH ADMIN OPTION', p_role::regrole, current_user);
    END IF;
    RETURN NULL;
END $$;

-- Makes the executor login of a role: LOGIN, NOINHERIT, member of that role and of nothing else; administered by the
-- owner of this schema, who gives it its password. Only what is missing is done, so it also repairs. Runs with the
-- caller's rights; what they don't reach is said in a WARNING that names the GRANT.
CREATE FUNCTION duroxide.make_executor(p_role oid) RETURNS void
LANGUAGE plpgsql STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_executor text := 'dfx_' || p_role;
    v_owner name := (SELECT pg_get_userbyid(n.nspowner) FROM pg_namespace n WHERE n.nspname = 'duroxide');
    v_16 boolean := current_setting('server_version_num')::integer >= 160000;
    v_missing text := duroxide.missing_for_executor(p_role);
    v_oid oid;
BEGIN
    IF v_missing IS NOT NULL THEN
        RAISE WARNING 'no executor login was made for role %: its workflows can be started, but their steps can''t run', p_role::regrole
            USING ERRCODE = '01007',
                  HINT = format('As a superuser, run either SELECT df.grant_usage(%L), or %s and then this again.',
                                (SELECT r.rolname FROM pg_roles r WHERE r.oid = p_role), v_missing);
        RETURN;
    END IF;
    IF to_regrole(v_executor) IS NULL THEN
        EXECUTE format('CREATE ROLE %I LOGIN NOINHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION', v_executor);
    END IF;
    v_oid := to_regrole(v_executor);
    IF NOT EXISTS (SELECT FROM pg_auth_members m WHERE m.roleid = p_role AND m.member = v_oid) THEN
        EXECUTE format(CASE WHEN v_16 THEN 'GRANT %s TO %I WITH INHERIT FALSE, SET TRUE' ELSE 'GRANT %s TO %I' END,
                       p_role::regrole, v_executor);
    END IF;
    IF current_user <> v_owner AND NOT EXISTS (
        SELECT FROM pg_auth_members m WHERE m.roleid = v_oid AND m.member = v_owner::regrole AND m.admin_option) THEN
        EXECUTE format(CASE WHEN v_16 THEN 'GRANT %I TO %I WITH ADMIN TRUE, INHERIT FALSE, SET FALSE'
                            ELSE 'GRANT %I TO %I WITH ADMIN OPTION' END, v_executor, v_owner);
    END IF;
    PERFORM duroxide.register_executor(p_role);
END $$;

-- Records an executor login and lets it write checkpoints, each of which must prove its lease.
-- SECURITY DEFINER: a delegated admin may call it, but only the owner can grant this. It accepts only a login that is what
-- make_executor makes.
CREATE FUNCTION duroxide.register_executor(p_role oid) RETURNS void
LANGUAGE plpgsql STRICT SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_executor text := 'dfx_' || p_role;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles r WHERE r.rolname = v_executor AND r.rolcanlogin AND NOT r.rolinherit AND NOT r.rolsuper
                      AND NOT r.rolcreaterole AND NOT r.rolcreatedb AND NOT r.rolreplication AND NOT r.rolbypassrls)
        OR (SELECT array_agg(DISTINCT m.roleid) FROM pg_auth_members m WHERE m.member = to_regrole(v_executor))
            IS DISTINCT FROM ARRAY[p_role]
        OR EXISTS (SELECT FROM pg_auth_members m WHERE m.member = to_regrole(v_executor) AND m.admin_option) THEN
        RAISE EXCEPTION 'role % is not a sound executor login for role %', v_executor, p_role::regrole
            USING ERRCODE = '42501',
                  HINT = 'It must be LOGIN NOINHERIT, without any further right, and a member of that role alone.';
    END IF;
    EXECUTE format('GRANT USAGE ON SCHEMA duroxide TO %I', v_executor);
    EXECUTE format('GRANT EXECUTE ON FUNCTION duroxide.checkpoint(text, uuid, jsonb, text, bigint[], text[], jsonb, timestamptz, jsonb)'
                   ' TO %I', v_executor);
    INSERT INTO duroxide.executors (role, executor) VALUES (p_role, to_regrole(v_executor))
    ON CONFLICT (role) DO UPDATE SET executor = EXCLUDED.executor, password_set = false
        WHERE executors.executor <> EXCLUDED.executor;
    IF NOT has_database_privilege(v_executor, current_database(), 'CONNECT') THEN
        RAISE WARNING 'executor login % may not connect to this database', v_executor
            USING HINT = format('Run: GRANT CONNECT ON DATABASE %I TO %I', current_database(), v_executor);
    END IF;
END $$;

-- The reverse, unless the role may still use df (somebody else granted it), or has workflows that have not ended: these go on
-- (SURFACE 1.8). True if it was forgotten.
CREATE FUNCTION duroxide.forget_executor(p_role oid) RETURNS boolean
LANGUAGE plpgsql STRICT SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_executor regrole;
BEGIN
    IF has_schema_privilege(p_role, 'df', 'USAGE') THEN
        RETURN false;
    ELSIF EXISTS (SELECT FROM duroxide.instances i WHERE i.submitted_by = p_role AND i.status IN ('pending', 'running')) THEN
        RAISE NOTICE 'executor login dfx_% is kept: workflows of role % have not ended', p_role, p_role::regrole
            USING HINT = 'Revoke again once they have.';
        RETURN false;
    END IF;
    DELETE FROM duroxide.executors e WHERE e.role = p_role RETURNING e.executor INTO v_executor;
    IF NOT FOUND OR NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = v_executor) THEN
        RETURN false;
    END IF;
    EXECUTE format('REVOKE ALL ON FUNCTION duroxide.checkpoint(text, uuid, jsonb, text, bigint[], text[], jsonb, timestamptz, jsonb)'
                   ' FROM %s', v_executor);
    EXECUTE format('REVOKE ALL ON SCHEMA duroxide FROM %s', v_executor);
    RETURN true;
END $$;

-- The grants themselves: privilege, object, and what the original grants only to some.
CREATE FUNCTION duroxide.usage_grants(include_http boolean, with_grant boolean)
RETURNS TABLE (privilege text, object text)
LANGUAGE sql IMMUTABLE
BEGIN ATOMIC
    SELECT g.privilege, g.object
      FROM (VALUES
        ('USAGE', 'SCHEMA df', true),
        ('USAGE', 'SCHEMA duroxide', true),
        ('SELECT', 'df.instances', true),
        ('SELECT', 'df.nodes', true),
        ('SELECT, INSERT, UPDATE, DELETE', 'df.vars', true),
        ('SELECT', 'duroxide.instances', true),
        ('INSERT (id, label, graph, vars, database), DELETE', 'duroxide.instances', true),
        ('SELECT (instance_id, wake_at, claims, crashes, started_at)', 'duroxide.queue', true),
        ('SELECT', 'duroxide.history', true),
        ('INSERT (instance_id, kind, name, data)', 'duroxide.signals', true),
        ('SELECT, INSERT, UPDATE, DELETE', 'duroxide.vars', true),
        ('EXECUTE', 'FUNCTION df.http(text, text, text, jsonb, integer)', usage_grants.include_http),
        ('EXECUTE', 'FUNCTION df.http_multipart(text, text, jsonb, jsonb, integer)', usage_grants.include_http),
        ('EXECUTE', 'FUNCTION df.grant_usage(text, boolean, boolean)', usage_grants.with_grant),
        ('EXECUTE', 'FUNCTION df.revoke_usage(text)', usage_grants.with_grant),
        ('EXECUTE', 'FUNCTION df.metrics()', usage_grants.with_grant),
        ('EXECUTE', 'FUNCTION duroxide.register_executor(oid)', usage_grants.with_grant),
        ('EXECUTE', 'FUNCTION duroxide.forget_executor(oid)', usage_grants.with_grant)
      ) AS g(privilege, object, wanted)
     WHERE g.wanted;
END;

-- Lets a role use `df`; 'public' means everybody. Only adds privileges, and makes the role's executor login.
CREATE FUNCTION df.grant_usage(p_role text, include_http boolean DEFAULT false, with_grant boolean DEFAULT false) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_grant record;
    v_role oid;
    v_super boolean;
BEGIN
    IF p_role IS NULL THEN
        RAISE EXCEPTION 'df.grant_usage: p_role cannot be NULL' USING ERRCODE = '22004';
    ELSIF p_role <> 'public' THEN
        SELECT r.oid, r.rolsuper INTO v_role, v_super FROM pg_roles r WHERE r.rolname = p_role;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'role "%" does not exist', p_role
                USING ERRCODE = '42704', HINT = 'Role names are matched exactly, case included; public (lower case) means everybody.';
        END IF;
    END IF;
    FOR v_grant IN SELECT g.privilege, g.object FROM duroxide.usage_grants(include_http, with_grant) g LOOP
        EXECUTE format('GRANT %s ON %s TO %I%s', v_grant.privilege, v_grant.object, p_role,
                       CASE WHEN with_grant THEN ' WITH GRANT OPTION' ELSE '' END);
    END LOOP;
    IF v_role IS NOT NULL AND NOT v_super
        AND v_role <> (SELECT n.nspowner FROM pg_namespace n WHERE n.nspname = 'duroxide') THEN
        PERFORM duroxide.make_executor(v_role);
    END IF;
    RAISE NOTICE 'pg_durable: granted df usage privileges to "%"', p_role;
END $$;

-- Takes back what the caller granted, with what was passed on, and the executor login.
CREATE FUNCTION df.revoke_usage(p_role text) RETURNS void
LANGUAGE plpgsql STRICT
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_grant record;
    v_role oid;
    v_database text := format('%I', current_database());
BEGIN
    IF p_role <> 'public' THEN
        SELECT r.oid INTO v_role FROM pg_roles r WHERE r.rolname = p_role;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'role "%" does not exist', p_role
                USING ERRCODE = '42704', HINT = 'Role names are matched exactly, case included; public (lower case) means everybody.';
        END IF;
    END IF;
    FOR v_grant IN SELECT g.privilege, g.object FROM duroxide.usage_grants(true, true) g LOOP
        BEGIN
            EXECUTE format('REVOKE %s ON %s FROM %I CASCADE', v_grant.privilege, v_grant.object, p_role);
        EXCEPTION WHEN insufficient_privilege THEN
            IF v_grant.object NOT LIKE 'FUNCTION %' THEN
                RAISE;
            END IF;
        END;
    END LOOP;
    IF v_role IS NOT NULL AND has_function_privilege('duroxide.forget_executor(oid)', 'EXECUTE')
        AND duroxide.forget_executor(v_role) THEN
        BEGIN
            EXECUTE format('DROP ROLE %I', 'dfx_' || v_role);
        EXCEPTION WHEN insufficient_privilege OR dependent_objects_still_exist THEN
            RAISE NOTICE 'executor login dfx_% is left in place: %', v_role, SQLERRM;
        END;
    END IF;
    RAISE NOTICE 'pg_durable: revoked df usage privileges granted by "%" from "%"', current_user, p_role;
END $$;

REVOKE ALL ON FUNCTION df.metrics(), df.grant_usage(text, boolean, boolean), df.revoke_usage(text),
    duroxide.register_executor(oid), duroxide.forget_executor(oid) FROM PUBLIC;
