-- A trigger starts a workflow in the transaction that inserts the row: no row, no workflow.
CREATE TABLE orders (id int PRIMARY KEY, total numeric, invoiced boolean NOT NULL DEFAULT false);
CREATE TABLE invoices (order_id int, total numeric);
CREATE TABLE started (order_id int, instance text);

CREATE FUNCTION order_placed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO started VALUES (NEW.id, df.start(
        ('INSERT INTO invoices SELECT id, total FROM orders WHERE id = ' || NEW.id)
        ~> ('UPDATE orders SET invoiced = true WHERE id = ' || NEW.id),
        'order-' || NEW.id));
    RETURN NEW;
END $$;
CREATE TRIGGER order_placed AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION order_placed();

INSERT INTO orders (id, total) VALUES (1, 12.50), (2, 99.00);

BEGIN;
INSERT INTO orders (id, total) VALUES (3, 1.00);
ROLLBACK;

SELECT order_id, df.await_instance(instance) FROM started ORDER BY order_id;
SELECT o.id, o.invoiced, i.total FROM orders o JOIN invoices i ON i.order_id = o.id ORDER BY o.id;
