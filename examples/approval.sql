-- A payment above a limit waits, for up to a day, until somebody approves it. Waiting costs one row: no connection, no memory.
CREATE TABLE payments (id int PRIMARY KEY, amount numeric, state text NOT NULL DEFAULT 'new');
INSERT INTO payments (id, amount) VALUES (1, 25000.00);

SELECT df.start(
  'SELECT amount > 10000 AS large FROM payments WHERE id = 1' |=> 'payment'
  ~> ('SELECT $payment.large'
      ?> ('UPDATE payments SET state = ''waiting'' WHERE id = 1'
          ~> (df.wait_for_signal('approve', 86400) |=> 'answer')
          ~> ('SELECT NOT $answer.timed_out'
              ?> 'UPDATE payments SET state = ''approved'' WHERE id = 1'
              !> 'UPDATE payments SET state = ''expired'' WHERE id = 1'))
      !> 'UPDATE payments SET state = ''approved'' WHERE id = 1'),
  'approval') AS id \gset

-- Somebody else, later. A signal that comes before the wait is kept for it.
SELECT df.signal(:'id', 'approve', '{"by": "Ann"}');

SELECT df.await_instance(:'id');
SELECT state FROM payments WHERE id = 1;
