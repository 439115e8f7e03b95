-- df.start(transaction_mode => 'new'): a start that commits by itself (SURFACE 1.3 and 10.3; docs/architecture.md,
-- "Starting in a transaction of its own").
--
-- A SQL function can't commit on its own, so duroxide.launch asks the proxy, which sits on the wire: it sends an INFO message
-- with SQLSTATE DF002, the proxy takes it out of the stream, starts the workflow on a connection of its own, and says so. No
-- snapshot that the caller may have taken long ago would show the new row; what both sides see at once are locks:
--   slot   (0x50474446, n): held by the caller; there are max_new_transaction_starts of them
--   key    (a random even number): held by the caller while it waits
--   key+1  held by the proxy from before it looks whether the key is held until the end; by a caller that gives up
-- The answer is a session of the service role that waits for the key: in share mode, the workflow was started; in exclusive
-- mode, it was not, and the waiting statement's text says why. All locks are those of a transaction: none can be left behind.

-- What proves to the proxy that code which ran as this role made a request: a keyed hash of the role and the request's digest,
-- which the caller leaves in df.launch_digest. The view reads the secret with its owner's rights, but current_user in it
-- is who asks; so nobody can make a seal for another role, neither over the wire nor in SQL.
CREATE VIEW duroxide.launch_seal AS
SELECT encode(sha256(convert_to(s.value, 'UTF8') || sha256(convert_to(
           s.value || '|launch|' || duroxide.me()::oid::text || '|' || current_setting('df.launch_digest', true), 'UTF8'))), 'hex') AS seal
  FROM duroxide.secret s;
GRANT SELECT ON duroxide.launch_seal TO PUBLIC;

-- Whether somebody holds a key, that is: still waits for the answer.
CREATE FUNCTION duroxide.launch_awaited(p_key bigint) RETURNS boolean
LANGUAGE sql STRICT
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT EXISTS (SELECT FROM pg_locks l
                    WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted AND l.mode = 'ExclusiveLock'
                      AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
                      AND l.classid = ((p_key >> 32) & 4294967295)::oid AND l.objid = (p_key & 4294967295)::oid)
$$;

-- What the proxy has said so far: NULL (nothing), {"state": "busy"}, {"state": "started"}, {"state": "failed", "error": {...}}.
-- SECURITY DEFINER: only the service role may read its own sessions' statements. Answers of other roles don't count.
CREATE FUNCTION duroxide.launch_answer(p_key bigint) RETURNS jsonb
LANGUAGE plpgsql STRICT SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_owner oid := (SELECT n.nspowner FROM pg_namespace n WHERE n.nspname = 'duroxide');
    v_session record;
BEGIN
    PERFORM pg_stat_clear_snapshot();
    SELECT l.granted, l.mode, a.query INTO v_session
      FROM pg_locks l CROSS JOIN LATERAL pg_stat_get_activity(l.pid) a
     WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.pid <> pg_backend_pid()
       AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
       AND l.classid = ((p_key >> 32) & 4294967295)::oid
       AND (l.objid = (p_key & 4294967295)::oid AND NOT l.granted OR l.objid = ((p_key + 1) & 4294967295)::oid AND l.granted)
       AND pg_has_role(a.usesysid, v_owner, 'MEMBER')
     ORDER BY l.granted LIMIT 1;
    IF NOT FOUND THEN
        RETURN NULL;
    ELSIF v_session.granted THEN
        RETURN '{"state": "busy"}';
    ELSIF v_session.mode = 'ShareLock' THEN
        RETURN '{"state": "started"}';
    END IF;
    BEGIN
        RETURN jsonb_build_object('state', 'failed', 'error', convert_from(decode(
            substring(v_session.query FROM '''([A-Za-z0-9+/=]+)'''), 'base64'), 'UTF8')::jsonb);
    EXCEPTION WHEN data_exception OR character_not_in_repertoire THEN
        RETURN '{"state": "failed"}';    -- track_activities is off, or cuts statements short
    END;
END $$;

-- Sends a request, in pieces that are small enough for the proxy to look at.
CREATE FUNCTION duroxide.send_launch(p_request text) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_raw bytea := convert_to(p_request, 'UTF8');
    v_text text := translate(encode(v_raw, 'base64'), E'\n', '');
    v_size CONSTANT integer := 300000;
    v_count integer := (length(v_text) - 1) / v_size + 1;
    v_digest text := encode(sha256(v_raw), 'hex');
    v_seal text;
BEGIN
    PERFORM set_config('df.launch_digest', v_digest, true);
    SELECT s.seal INTO STRICT v_seal FROM duroxide.launch_seal s;
    FOR i IN 1 .. v_count LOOP
        RAISE INFO USING ERRCODE = 'DF002', MESSAGE = 'asking dfproxy to start a workflow in a transaction of its own',
            CONSTRAINT = format('dfproxy:start=%s/%s', i, v_count), TABLE = v_seal,
            DATATYPE = substr(v_text, (i - 1) * v_size + 1, v_size);
    END LOOP;
END $$;

-- One try: NULL once the workflow `p_id` is started, else the proxy's error. Raises where no answer can be had.
CREATE FUNCTION duroxide.try_launch(p_id text, fut text, label text, database text) RETURNS jsonb
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_slots CONSTANT integer := COALESCE(duroxide.setting('max_new_transaction_starts')::integer, 2);
    v_patience CONSTANT double precision := COALESCE(duroxide.setting('new_transaction_start_timeout')::double precision, 5);
    v_deadline timestamptz := clock_timestamp() + make_interval(secs => v_patience);
    v_key bigint;
    v_busy boolean := false;
    v_pause double precision := 0.002;
    v_answer jsonb;
BEGIN
    -- A block of its own, which always ends in an exception: that is what releases its locks.
    BEGIN
        <<slot>> LOOP
            FOR i IN 0 .. v_slots - 1 LOOP
                EXIT slot WHEN pg_try_advisory_xact_lock(1346982470, i);
            END LOOP;
            IF clock_timestamp() >= v_deadline THEN
                RAISE EXCEPTION 'pg_durable: transaction_mode => ''new'' launch limit reached (max_new_transaction_starts=%). '
                        'Timed out after %s waiting for a launch slot before opening the loopback session.', v_slots, v_patience
                    USING ERRCODE = '53400', HINT = 'Raise max_new_transaction_starts in the settings of dfproxy.';
            END IF;
            PERFORM pg_sleep(0.1);
        END LOOP;
        LOOP
            v_key := ('x' || left(replace(gen_random_uuid()::text, '-', ''), 16))::bit(64)::bigint & -2::bigint;
            EXIT WHEN pg_try_advisory_xact_lock(v_key);
        END LOOP;
        PERFORM duroxide.send_launch(json_build_object('id', p_id, 'fut', fut, 'label', label, 'database', database,
            'role', duroxide.me()::oid::bigint, 'key', v_key::text, 'at', extract(epoch FROM clock_timestamp()))::text);
        v_deadline := clock_timestamp() + make_interval(secs => v_patience);
        LOOP
            v_answer := duroxide.launch_answer(v_key);
            EXIT WHEN v_answer->>'state' IN ('started', 'failed');
            IF v_answer IS NULL AND v_busy THEN
                RAISE EXCEPTION 'df.start() on new transaction failed: dfproxy has gone before it answered'
                    USING ERRCODE = '08006', DETAIL = format('Whether workflow %s was started is not known.', p_id),
                          HINT = format('SELECT df.status(%L) says so.', p_id);
            ELSIF v_answer IS NOT NULL AND NOT v_busy THEN
                v_busy := true;    -- its own limits, 30 s for any one statement, are in force now
                v_deadline := clock_timestamp() + interval '90 s';
            ELSIF clock_timestamp() >= v_deadline THEN
                -- With key+1 in our hands it can't begin any more.
                IF v_busy OR pg_try_advisory_xact_lock(v_key + 1) THEN
                    RAISE EXCEPTION 'df.start() on new transaction failed: no answer within %s', v_patience
                        USING ERRCODE = '55000',
                              DETAIL = CASE WHEN v_busy THEN format('Whether workflow %s was started is not known.', p_id)
                                       ELSE 'Nobody has taken the request up.' END,
                              HINT = 'transaction_mode => ''new'' needs a connection through `dfproxy serve` that hosts a worker for this database.'
                                     ' On any other, call df.start() in a transaction of its own.';
                END IF;
            END IF;
            PERFORM pg_sleep(v_pause);
            v_pause := least(v_pause * 1.3, 0.1);
        END LOOP;
        RAISE EXCEPTION USING ERRCODE = 'DF004', MESSAGE = 'answered';
    EXCEPTION WHEN SQLSTATE 'DF004' THEN
        RETURN CASE v_answer->>'state' WHEN 'failed' THEN COALESCE(v_answer->'error', '{}') END;
    END;
END $$;

-- df.start's mode `new`: the new instance's id.
CREATE FUNCTION duroxide.launch(fut text, label text, database text) RETURNS text
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v_id text;
    v_error jsonb;
    v_message text;
BEGIN
    IF duroxide.in_workflow() THEN
        RAISE EXCEPTION 'df.start() with transaction_mode => ''new'' cannot be called inside a workflow'
            USING ERRCODE = '55000', HINT = 'A step commits by itself: leave transaction_mode out.';
    END IF;
    PERFORM duroxide.check_submitter(true);
    FOR attempt IN 1 .. 10 LOOP
        v_id := left(gen_random_uuid()::text, 8);
        v_error := duroxide.try_launch(v_id, fut, label, database);
        IF v_error IS NULL THEN
            RETURN v_id;
        END IF;
        EXIT WHEN v_error->>'sqlstate' IS DISTINCT FROM 'DF003';
    END LOOP;
    v_message := 'df.start() on new transaction failed: ' || CASE v_error->>'sqlstate'
        WHEN '55P03' THEN 'launch hit lock_timeout after 30000ms'
        WHEN '57014' THEN 'launch hit statement_timeout after 30000ms'
        ELSE COALESCE(v_error->>'message', 'the reason is in the log of dfproxy') END;
    PERFORM duroxide.error(COALESCE(v_error->>'sqlstate', '55000'), v_message, v_error->>'detail', v_error->>'hint', 0);
    RETURN NULL;    -- not reached
END $$;
